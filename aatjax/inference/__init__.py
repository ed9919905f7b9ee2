"""From an adapter file to predictions: clips, long recordings, segments, the server, the demo."""
