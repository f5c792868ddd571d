"""Sets of WebDataset shards: built, packed, and streamed in an order that resumes exactly."""
