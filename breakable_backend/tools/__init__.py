"""Tools: reports, measurements, comparison with eager, files and logs. The engine imports none of them."""
