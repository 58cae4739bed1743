"""Before a run: is everything there that it needs, will it fit, how long will it take; and a rehearsal of all of it."""
