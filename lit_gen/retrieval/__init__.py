"""Finding videos by descriptions: towers, contrastive losses, exhaustive ranking, and an index of a folder."""
