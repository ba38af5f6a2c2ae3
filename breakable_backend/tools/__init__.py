"""What looks on: reports, measurements, comparison with eager, files, logs."""
