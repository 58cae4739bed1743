"""Imported before all else by the server that runs are forked from: libraries then say nothing to the user."""

from trainer.tracking.silence import silence_libraries

silence_libraries()
