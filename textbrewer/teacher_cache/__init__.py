"""Teacher outputs on the disk, keyed by the content of the teacher's inputs and by what the teacher is."""

from textbrewer.teacher_cache.cache import CacheInfo, TeacherCache
from textbrewer.teacher_cache.contents import Contents
from textbrewer.teacher_cache.errors import CacheError
from textbrewer.teacher_cache.found import Found
from textbrewer.teacher_cache.space import Space

__all__ = ["CacheError", "CacheInfo", "Contents", "Found", "Space", "TeacherCache"]
