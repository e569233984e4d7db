"""Record <-> shard: TFRecord files of `tf.train.Example`, their card and their readers.

`convert` writes a data folder, `catalog` opens one, `tables` loads it into memory, `resident` orders it for
training, `stream` (the only module that imports TensorFlow) feeds what fits no memory. Nothing here imports
JAX.
"""

LANES = 8  # parts of equal weight that every data set lies in; here, so that training knows it without reading records
