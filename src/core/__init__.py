"""What every stage stands on: errors, words on the terminal, files, processes, artifacts, and the one door. No torch."""
