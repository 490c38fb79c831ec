"""The model store: imports models, keeps them by what is in them, and names them."""
