"""Built-in demo data: real pixels from installed wheels, made into datasets in the formats people have.

    demo:classification   ImageFolder: {train,val}/{0..9}/*.png, digits 32x32
    demo:detection        COCO: images/{train,val}/*.png, annotations/instances_{train,val}.json (boxes and RLE masks)
    demo:segmentation     the same folder as masks: images/ and masks/{train,val}/*.png, 0 = background, 1..10 = digits
    demo:restoration      {train,val}/*.png, clean colour photographs to degrade on the fly

`resolve('demo:detection')` returns the folder and builds it first where it is missing.
"""

from .build import NAMES, VERSION, is_demo, resolve
from .sources import MissingExtra

__all__ = ['NAMES', 'VERSION', 'MissingExtra', 'is_demo', 'resolve']
