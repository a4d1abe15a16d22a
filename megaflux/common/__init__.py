"""What every part of megaflux may use: errors and exit codes, files, paths, ranks."""
