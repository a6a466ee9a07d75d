"""Several engines behind one door: each is a process, and the door sends requests to them."""
