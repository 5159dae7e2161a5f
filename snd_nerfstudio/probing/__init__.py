"""What a frozen backbone knows: depth, normals, segmentation, correspondence."""
