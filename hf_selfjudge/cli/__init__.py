"""The command line: in arguments, out calls of the rest of the package. One file a command."""
