"""The floor below the ops: which backend runs, how it is called, and what every op checks."""
