"""From the graph that Dynamo traced to a program."""
