"""The classes of TotalSegmentator in their official order: a class's number is its place, counted from 1.

Source: the tables of classes in its documentation (releases v1 and v2 for CT, and MRI), `class_map` in its package.
"""

from __future__ import annotations

from collections.abc import Mapping

_VERTEBRAE = " ".join(
    f"vertebrae_{part}{number}" for part, count in (("L", 5), ("T", 12), ("C", 7)) for number in range(count, 0, -1)
)
_RIBS = " ".join(f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13))
_ILIAC_VESSELS = "iliac_artery_left iliac_artery_right iliac_vena_left iliac_vena_right"
_HIP_MUSCLES = (
    "gluteus_maximus_left gluteus_maximus_right gluteus_medius_left gluteus_medius_right gluteus_minimus_left "
    "gluteus_minimus_right autochthon_left autochthon_right iliopsoas_left iliopsoas_right"
)
_ABDOMEN = "spleen kidney_right kidney_left gallbladder liver stomach"
_ADRENAL_GLANDS = "adrenal_gland_right adrenal_gland_left"
_LUNG_LOBES = (
    "lung_upper_lobe_left lung_lower_lobe_left lung_upper_lobe_right lung_middle_lobe_right lung_lower_lobe_right"
)
_UPPER_LIMBS = "humerus_left humerus_right scapula_left scapula_right clavicula_left clavicula_right"
_HIPS = "femur_left femur_right hip_left hip_right"

_V2 = f"""
{_ABDOMEN} pancreas {_ADRENAL_GLANDS} {_LUNG_LOBES} esophagus trachea thyroid_gland small_bowel duodenum colon
urinary_bladder prostate kidney_cyst_left kidney_cyst_right sacrum vertebrae_S1 {_VERTEBRAE} heart aorta pulmonary_vein
brachiocephalic_trunk subclavian_artery_right subclavian_artery_left common_carotid_artery_right
common_carotid_artery_left brachiocephalic_vein_left brachiocephalic_vein_right atrial_appendage_left
superior_vena_cava inferior_vena_cava portal_vein_and_splenic_vein {_ILIAC_VESSELS} {_UPPER_LIMBS} {_HIPS} spinal_cord
{_HIP_MUSCLES} brain skull {_RIBS} sternum costal_cartilages
"""
_V1 = f"""
{_ABDOMEN} aorta inferior_vena_cava portal_vein_and_splenic_vein pancreas {_ADRENAL_GLANDS} {_LUNG_LOBES} {_VERTEBRAE}
esophagus trachea heart_myocardium heart_atrium_left heart_ventricle_left heart_atrium_right heart_ventricle_right
pulmonary_artery brain {_ILIAC_VESSELS} small_bowel duodenum colon {_RIBS} {_UPPER_LIMBS} {_HIPS} sacrum face
{_HIP_MUSCLES} urinary_bladder
"""
_MRI = f"""
{_ABDOMEN} pancreas {_ADRENAL_GLANDS} lung_left lung_right esophagus small_bowel duodenum colon urinary_bladder prostate
sacrum vertebrae intervertebral_discs spinal_cord heart aorta inferior_vena_cava portal_vein_and_splenic_vein
{_ILIAC_VESSELS} {_UPPER_LIMBS} {_HIPS}
{_HIP_MUSCLES} brain
"""
CLASS_LISTS: Mapping[str, tuple[str, ...]] = {
    "v2": tuple(_V2.split()),
    "v1": tuple(_V1.split()),
    "MRI": tuple(_MRI.split()),
}
