"""The store on disk: blobs by their content, artifacts made of them, what is half built."""
