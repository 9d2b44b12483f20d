"""Visual autoregressive models that come with the project."""
