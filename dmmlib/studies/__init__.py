"""The studies behind notebooks 01 and 06 to 11, one folder each. Importing this registers their settings."""

import dmmlib.studies.adversary.settings
import dmmlib.studies.cheap.settings
import dmmlib.studies.convex.settings
import dmmlib.studies.exact.settings
import dmmlib.studies.meta.settings
import dmmlib.studies.multimodal.settings
import dmmlib.studies.own.settings
