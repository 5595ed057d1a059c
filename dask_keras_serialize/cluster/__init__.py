"""On a cluster: what Dask asks of models, what workers tell, and what is said when they differ."""
