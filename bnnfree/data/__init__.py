"""Data sets: from the section `data` of a recipe to batches of images.

datasets (the table of them), parts (what each returns), pixel_split (images in memory), file_split (images read from
files as they are needed), augment (for both), subset (limits and shares). Sources: folder and image_folder, arrays,
tar_index and tar_images (shards), addresses (of shards: what may be fetched, and how). sizes imports nothing.
"""
