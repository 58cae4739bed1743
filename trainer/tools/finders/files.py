"""Short trials before a run that choose a number for it: the learning rate, the micro-batch. Nothing is trained."""

#: What the finders leave in a run folder; a run may begin beside it.
FINDER_FILES = ("find-lr.json", "find-lr.png", "find-batch.json")
