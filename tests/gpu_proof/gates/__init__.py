"""The configs that ship, an op a file: `cases()` calls the launchers for each kernel that they can ask Triton for."""
