"""What every part may use: errors and exit codes, files, paths, ranks."""
