"""From a program to a recording, and from a recording to the function that replays it."""
