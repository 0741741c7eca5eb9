"""One file a verb of the command line; each has ``main(argv) -> exit code`` and loads torch only when it runs."""
