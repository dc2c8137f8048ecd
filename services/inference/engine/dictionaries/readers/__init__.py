"""One module per family of files. Each has `matches(folder)` and `read(folder, origin)`."""
