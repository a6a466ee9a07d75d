"""Phi-3-vision and Phi-3.5-vision for opsin: crops of any layout, numbered images, two rotary scalings."""
