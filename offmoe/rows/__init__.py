"""Several sequences decoded in step: each layer's experts are fetched once for all of them."""
