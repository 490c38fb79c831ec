"""Where a model comes from: this machine's folders, files and packages; a hub; another registry."""
