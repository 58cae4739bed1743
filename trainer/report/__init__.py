"""Runs and the card, side by side: read, judged, drawn and written. No torch; wandb and matplotlib only when used."""
