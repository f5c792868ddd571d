"""Long videos: scripts of four to six events, everything that may be said of them, and what fits what was said."""
