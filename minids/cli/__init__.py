"""The command line `minids COMMAND`: one module per command, imported when the command is called."""
