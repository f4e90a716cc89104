"""Event-camera data: files, frames, splits and augmentation."""
