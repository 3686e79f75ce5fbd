"""From a folder of verified shards to batches on the device."""
