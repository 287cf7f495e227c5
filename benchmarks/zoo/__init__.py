"""Models of plain torch, small, as the public code of their papers writes them."""

from zoo import decays as decays
from zoo import dense as dense
from zoo import detect as detect
from zoo import diffusion as diffusion
from zoo import fields as fields
from zoo import flows as flows
from zoo import generative as generative
from zoo import language as language
from zoo import mechanics as mechanics
from zoo import metric as metric
from zoo import mixers as mixers
from zoo import routing as routing
from zoo import scripts as scripts
from zoo import speech as speech
from zoo import tables as tables
from zoo import vision as vision
from zoo import windows as windows
