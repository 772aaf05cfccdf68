"""Tests; bench/ shares their inputs (`tests.cases`) and their tolerance rule (`tests.tolerance`)."""
