"""What people do with models on Dask, on top of models that travel.

- ``inference``: ``predict`` over arrays, dataframes and bags; ``batches`` is what its tasks run,
  ``outputs`` says beforehand what they return.
- ``replicas``: live models for snapshots, filled anew rather than rebuilt; ``holding``: objects
  whose copies share one; ``estimators``: scikit-learn's, made so.
- ``averaging``: training in rounds; ``means``: of weights.
- ``searching``: lets dask-ml's adaptive searches run.

Nothing below imports them, and none loads Keras before it is given a model.
"""
