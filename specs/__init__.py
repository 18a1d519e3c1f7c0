"""Specs that ship with graphopt; `graphopt specs` lists them, and their names work wherever a spec is asked for."""
