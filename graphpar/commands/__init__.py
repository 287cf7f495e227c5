"""The subcommands of `graphpar`, one module each; `graphpar.cli` imports the one that is called."""
