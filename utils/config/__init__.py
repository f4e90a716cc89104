"""Settings: their types, defaults and rules, read from YAML files and the command line."""
