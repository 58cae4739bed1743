"""Short trials before a run that choose a number for it: the learning rate, the micro-batch. Nothing is trained."""

PROOF_FILE = "prove.json"
#: What the finders and `doctor.py --prove` leave in a run folder; a run may begin beside it.
FINDER_FILES = ("find-lr.json", "find-lr.png", "find-batch.json", PROOF_FILE)
