"""Where records come from: files of every everyday kind, packed or not, folders, globs and data sets of the hub."""
