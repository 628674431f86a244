"""Fair timings of one operator by several implementations: what `recattn bench` and `recattn profile` run."""
