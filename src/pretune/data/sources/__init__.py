"""Where rows come from: the hub, files, this Python's documentation, generated word problems."""
