"""Names of classes, in the order of the ids that are stored on disk."""

SCANNET40 = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
    "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes",
    "ceiling", "books", "refrigerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard",
    "person", "nightstand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture",
    "otherprop",
)  # fmt: skip
"""NYU40, which ScanNet's 2D labels use: ids 1 to 40."""

NYU13 = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "painting", "sofa", "table", "tv",
    "wall", "window",
)  # fmt: skip
"""The 13 classes of SceneNet's authors (A. Handa), ids 1 to 13."""

SCANNETPP100 = (
    "wall", "ceiling", "floor", "table", "door", "ceiling lamp", "cabinet", "blinds", "curtain", "chair",
    "storage cabinet", "office chair", "bookshelf", "whiteboard", "window", "box", "window frame", "monitor",
    "shelf", "doorframe", "pipe", "heater", "kitchen cabinet", "sofa", "windowsill", "bed", "shower wall",
    "trash can", "book", "plant", "blanket", "tv", "computer tower", "kitchen counter", "refrigerator", "jacket",
    "electrical duct", "sink", "bag", "picture", "pillow", "towel", "suitcase", "backpack", "crate", "keyboard",
    "rack", "toilet", "paper", "printer", "poster", "painting", "microwave", "board", "shoes", "socket",
    "bottle", "bucket", "cushion", "basket", "shoe rack", "telephone", "file folder", "cloth", "blind rail",
    "laptop", "plant pot", "exhaust fan", "cup", "coat hanger", "light switch", "speaker", "table lamp",
    "air vent", "clothes hanger", "kettle", "smoke detector", "container", "power strip", "slippers",
    "paper bag", "mouse", "cutting board", "toilet paper", "paper towel", "pot", "clock", "pan", "tap", "jar",
    "soap dispenser", "binder", "bowl", "tissue box", "whiteboard eraser", "toilet brush", "spray bottle",
    "headphones", "stapler", "marker",
)  # fmt: skip
"""The 100 benchmark classes of ScanNet++, in the order of FiT3D's evaluation data: ids 1 to 100."""

VOC21 = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""PASCAL VOC 2012: ids 0 to 20."""
