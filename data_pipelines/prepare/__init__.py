"""Raw videos to a data set: decode, cut, crop, detect, encode, write.

python -m data_pipelines.prepare --input=DIR[,DIR] --output=DIR --vae=FILE.safetensors
"""
