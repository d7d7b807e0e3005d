"""The command line: ``main`` dispatches to one file a verb; ``options`` holds what several verbs share."""
