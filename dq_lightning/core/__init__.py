"""What every other folder uses: errors, records, settings, console, devices, isolation of the random state."""
