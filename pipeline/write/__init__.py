"""From a source of labelled images to a folder of verified shards."""
