"""graphopt: a compiler for training graphs."""
